"""The endpoint: Ray Serve around the decode engine, spoken to like OpenAI's API."""
