"""What happens while a step is traced: recording, replacing, refusing, and bringing the record into its final form."""
