"""A live demonstration: a real OCR model swapped under traffic by editing documents in etcd."""
