"""What can be proved of a network, per image and as a whole, rounding errors included."""
