"""Other libraries' formats: what they read from us, what we read from them, and the hub."""
