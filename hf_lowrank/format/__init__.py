"""What lies on disk: stored forms, headers, the loader of transformers and a strict one."""
