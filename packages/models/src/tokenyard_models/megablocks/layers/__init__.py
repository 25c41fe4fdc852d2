"""The modules of MegaBlocks' layers."""
