"""The main job, step by step: from options and a model to an output folder."""
