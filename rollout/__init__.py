"""vLLM rollout actors: soft-token sampling, trajectories (Arrow) and weight loading."""
