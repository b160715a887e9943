"""What keeps this machine from training: facts about it, and checks of them."""
