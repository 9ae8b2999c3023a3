"""What a recipe becomes elsewhere: a training script, other tools' formats."""
