"""A strategy and a precision for accel, in a package of their own."""

from accel.interfaces import Precision, Strategy


class Averaging(Strategy):
    """Averages all gradients in one message after backward."""

    def setup(self, model):
        import torch.distributed as dist

        if self.mesh.size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, group=self.mesh.group, group_src=0)

    def after_backward(self, model, exchange):
        if exchange and self.mesh.size > 1:
            self.average([p for p in model.parameters() if p.requires_grad])

    def settle(self, model):  # gradients that came from a bare loss.backward()
        self.after_backward(model, exchange=True)

    def average(self, parameters):
        import torch
        import torch.distributed as dist

        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        used = gradients[0].new_tensor([p.grad is not None for p in parameters])  # on this process; the sum: on any
        message = torch.cat([*(g.flatten() for g in gradients), used])
        dist.all_reduce(message, group=self.mesh.group)
        *means, used = (message / self.mesh.size).split([*(p.numel() for p in parameters), len(parameters)])
        for p, mean, share in zip(parameters, means, used.tolist(), strict=True):
            p.grad = mean.view_as(p) if share else None


class LeanBF16(Precision):
    """bfloat16 arithmetic that keeps no bfloat16 copies of the weights: less memory, more work."""

    dtype = "bfloat16"

    def forward(self):
        import torch

        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)

    def output(self, value):
        from accel.runtime.nested import map_tensors

        return map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, value)
