//! A module that follows another one.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use super::Path;
use super::state::is_statistic;

/// A copy of `module` with running statistics of its own, which gradients do not reach.
pub fn teacher_of<M: Module>(module: &M) -> M {
    // A clone would share the running statistics.
    module.valid().train().no_grad()
}

/// Moves `teacher` towards `student`, a module of the same form: every parameter θ becomes momentum·θ +
/// (1 − momentum)·the student's. Running statistics stay as they are.
pub fn follow<M: Module>(teacher: M, student: &M, momentum: f64) -> M {
    let mut reader = Reader::default();
    student.visit(&mut reader);
    teacher.map(&mut Follower {
        path: Path::default(),
        towards: reader.parameters,
        momentum,
    })
}

#[derive(Default)]
struct Reader {
    path: Path,
    /// Flat.
    parameters: BTreeMap<String, Tensor<1>>,
}

impl ModuleVisitor for Reader {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let flat = param.val().without_autodiff().reshape([-1]);
        self.parameters.insert(self.path.name(), flat);
    }
}

struct Follower {
    path: Path,
    towards: BTreeMap<String, Tensor<1>>,
    momentum: f64,
}

impl ModuleMapper for Follower {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.path.last().is_some_and(is_statistic) {
            return param;
        }
        let goal = self
            .towards
            .remove(&self.path.name())
            .expect("the student has the teacher's form");
        param.map(|old| {
            let recorded = old.device().is_autodiff();
            let old = old.without_autodiff();
            let new =
                old.clone() * self.momentum + goal.reshape(old.dims()) * (1.0 - self.momentum);
            if recorded {
                Tensor::from_inner(new)
            } else {
                new
            }
        })
    }
}
