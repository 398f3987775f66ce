"""Images to train on, by readers that execute nothing of what they read."""
