"""PP-OCRv4 as a pipeline: the Python between its three models."""
