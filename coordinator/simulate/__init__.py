"""Hardware one does not have: models of devices and links, and what runs on them in virtual time."""
