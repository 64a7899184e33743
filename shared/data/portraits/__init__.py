"""The synthetic faces: who they are, the numbers of each picture, and how it is drawn."""
