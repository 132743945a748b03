"""ZeRO on torch's FSDP2: `strategy` holds the plugins, the other modules the engine that the three stages share."""
