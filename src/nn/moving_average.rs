//! A module that follows another one.

use burn::module::Module;
use burn::tensor::Tensor;

use super::state::{is_statistic, tensors, with_tensors};

/// A copy of `module` with running statistics of its own, which gradients do not reach.
pub fn teacher_of<M: Module>(module: &M) -> M {
    // A clone would share the running statistics.
    module.valid().train().no_grad()
}

/// Moves `teacher` towards `student`, a module of the same form: every parameter θ becomes momentum·θ +
/// (1 − momentum)·the student's. Running statistics stay as they are.
pub fn follow<M: Module>(teacher: M, student: &M, momentum: f64) -> M {
    let goals = tensors(student);
    with_tensors(teacher, |path, old| {
        if is_statistic(path) {
            return None;
        }
        let recorded = old.is_autodiff();
        let goal = goals[path].clone().without_autodiff();
        let new = old.without_autodiff() * momentum + goal * (1.0 - momentum);
        Some(if recorded {
            Tensor::from_inner(new)
        } else {
            new
        })
    })
}
