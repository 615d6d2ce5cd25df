"""Files on any fsspec URI, models and texts wherever they are."""
