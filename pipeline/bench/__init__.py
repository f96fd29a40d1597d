"""Speed and memory measurements: ratios of variants, measured in one process on the same weights and samples."""
