"""A pool behind an endpoint that speaks the OpenAI chat protocol."""
