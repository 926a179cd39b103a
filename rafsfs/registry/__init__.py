"""Image stores: a repository of an OCI registry, or an OCI image layout directory. Start at `store.open_store`."""
