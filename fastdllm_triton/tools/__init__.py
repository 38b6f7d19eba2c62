"""What can be known about kernels and models beside what they compute: cost, compiled code, the machine."""
