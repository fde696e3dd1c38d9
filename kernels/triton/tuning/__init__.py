"""What `flexmsa.autotune` tries."""
