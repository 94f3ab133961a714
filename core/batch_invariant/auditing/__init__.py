"""What a program really ran: every operator and generated kernel, and whether it is covered."""
