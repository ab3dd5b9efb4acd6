"""From a request to what the engine takes, and from its tokens to an answer."""
