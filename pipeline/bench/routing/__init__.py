"""Routers side by side on a sequence of tasks that resemble each other, with CLIP keys alone."""
