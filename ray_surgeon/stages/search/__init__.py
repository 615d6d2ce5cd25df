"""The search for how many coupled groups every block loses."""
