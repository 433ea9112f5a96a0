"""Programs that play a folder in a client, each started by file in an environment of its own."""
