"Training: data, learner, recipes, runs"
