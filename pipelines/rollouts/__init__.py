"""Teacher rollouts on their own actors: which rows, who makes them, how they are streamed or cached."""
