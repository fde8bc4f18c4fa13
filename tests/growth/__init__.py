"""A cluster, a client, a level rule and an observer of somebody else's: one file and one YAML each, nothing of ours."""
