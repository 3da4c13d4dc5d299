"""From a model and example inputs to ATen graphs, with the model left as it was found."""
