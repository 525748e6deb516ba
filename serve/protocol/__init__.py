"""OpenAI's HTTP protocol: what clients may send, what they receive, and errors."""
