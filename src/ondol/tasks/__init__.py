"""Where problems come from. Every task scores responses and checks itself without a model."""
