"""`deit-cli init`: looks at the images and the machine, and writes commented settings files for both stages."""
