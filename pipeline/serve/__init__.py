"""An HTTP endpoint with the OpenAI chat protocol for a run or an adapter."""
