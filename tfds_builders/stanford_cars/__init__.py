"""Stanford Cars: photographs of 196 models of cars."""
