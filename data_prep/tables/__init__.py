"""Tables of samples from other programs: CSV, JSON, spreadsheets, Parquet, and folders of Hugging Face datasets."""
