"""The torch path: blocks of whole units, torch's own update functions."""
