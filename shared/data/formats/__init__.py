"""What files of pictures hold beside their pixels."""
