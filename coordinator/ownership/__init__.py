"""Who owns which bytes from when to when: hazards found in plans, told as stories, and acted out as scenarios."""
