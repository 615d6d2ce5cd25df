"""Workers that own shards, and two ways to run them: in this process, and as Ray actors."""
