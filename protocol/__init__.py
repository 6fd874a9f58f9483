"""What coordinator and workers share: types, limits, plans and the wire between them."""

CROSSDOCK = True
"""Other distributions are called `protocol` too; workers check that this is the one that they imported."""
