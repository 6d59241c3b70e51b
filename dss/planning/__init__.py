"""Planning a step: memory, time and communication, from the compiled program."""
