"""A page on which a person labels the images that a run asks for, served on loopback."""
