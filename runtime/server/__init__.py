"""The HTTP server: OpenAI's API over the slots of one artifact."""
