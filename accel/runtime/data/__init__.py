"""The steps behind `PreparedLoader`: whose samples are whose, in what order, who reads them, and the way to the device.

`share` is arithmetic on sequences, `order` makes the sequence of an epoch, `read` turns it into batches, `dispatch`
sends them where one process reads for all, `transfer` moves them to the device.
"""
