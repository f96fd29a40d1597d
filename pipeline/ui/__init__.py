"""A page in the browser, served on loopback: runs side by side, their answers, a chat, and the start of `add`."""
