"""The version, which modules below the public interface record."""

__version__ = "0.2.0"
