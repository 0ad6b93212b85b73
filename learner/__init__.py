"""DeepSpeed learner actors: likelihood, advantage, policy loss, packing, weight publishing."""
