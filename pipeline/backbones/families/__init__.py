"""The supported model families, one file each: the answers to the questions of `LMMFamily`."""
