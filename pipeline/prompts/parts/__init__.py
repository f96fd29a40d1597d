"""Parts: what a stage learns, and how modules of each kind enter the frozen model."""
