//! Parts of a batch that differ in their form, and so cannot be one tensor.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};
use rayon::prelude::*;

use super::total;

/// What `work` makes of each, in their order: side by side where the processor computes, whose threads would else share
/// operations too small for them.
pub(crate) fn side_by_side<T: Send, R: Send>(
    parts: Vec<T>,
    work: impl Fn(T) -> R + Send + Sync,
) -> Vec<R> {
    if crate::device() == Device::flex() {
        parts.into_par_iter().map(work).collect()
    } else {
        parts.into_iter().map(work).collect()
    }
}

/// The sum of the losses, `[1]`, of parts of a batch, and what else `loss` gives for each. Every part has a graph of its
/// own, which is gone by the end: gradients are found at once, and added in the order of the parts. The result has them
/// as its gradient with respect to `module`; where one of them is not finite, it is NaN. The parts share what `module`
/// has beside parameters, so running statistics must be fixed.
pub(crate) fn sum_of_losses<M: Module + Sync, T: Send, R: Send>(
    module: &M,
    parts: Vec<T>,
    loss: impl Fn(&M, T) -> (Tensor<1>, R) + Send + Sync,
) -> (Tensor<1>, Vec<R>) {
    let done = side_by_side(parts, |part| {
        let own = module.clone().map(&mut OwnLeaves);
        let (loss, rest) = loss(&own, part);
        let value = loss.clone().inner();
        let mut found = Found {
            gradients: loss.backward(),
            flat: Vec::new(),
        };
        own.visit(&mut found);
        (value, found.flat, rest)
    });
    let mut value = Tensor::zeros([1], &crate::device());
    let mut gradients: Vec<Option<Tensor<1>>> = Vec::new();
    let mut rests = Vec::with_capacity(done.len());
    for (part, found, rest) in done {
        value = value + part;
        gradients.resize(found.len(), None);
        for (sum, gradient) in gradients.iter_mut().zip(found) {
            *sum = match (sum.take(), gradient) {
                (Some(sum), Some(gradient)) => Some(sum + gradient),
                (sum, gradient) => sum.or(gradient),
            };
        }
        rests.push(rest);
    }
    let mut products = Products {
        gradients: gradients.into_iter(),
        sum: Tensor::zeros([1], &crate::device().autodiff()),
    };
    module.visit(&mut products);
    // Nothing is added, but its gradient.
    let nothing = products.sum.clone() - products.sum.detach();
    (Tensor::from_inner(value) + nothing, rests)
}

/// Makes parameters that learn leaves of another graph, with the same values.
struct OwnLeaves;

impl ModuleMapper for OwnLeaves {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match param.val().is_require_grad() {
            true => param.map(|old| Tensor::from_inner(old.inner()).require_grad()),
            false => param,
        }
    }
}

/// The gradient of each parameter in the order of a visit, flat.
struct Found {
    gradients: Gradients,
    flat: Vec<Option<Tensor<1>>>,
}

impl ModuleVisitor for Found {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = param.val().grad_remove(&mut self.gradients);
        self.flat
            .push(gradient.map(|gradient| gradient.reshape([-1])));
    }
}

/// Σ over all parameters and their entries of entry times gradient, whose gradient is just that.
struct Products {
    gradients: std::vec::IntoIter<Option<Tensor<1>>>,
    sum: Tensor<1>,
}

impl ModuleVisitor for Products {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.gradients.next();
        if let Some(gradient) = gradient.expect("the module is that of the parts") {
            let gradient = Tensor::from_inner(gradient.reshape([1, -1]));
            let product = param.val().reshape([1, -1]) * gradient;
            self.sum = self.sum.clone() + total(product);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::nn::{Init, Linear, values};

    const WIDTH: usize = 64;

    #[derive(Module, Debug)]
    struct Two {
        first: Linear,
        second: Linear,
    }

    /// Only some parts use the second layer.
    fn loss(two: &Two, part: usize) -> (Tensor<1>, usize) {
        // So many that each layer is work for several threads.
        let rows = 300 * (part + 1);
        let x: Vec<f32> = (0..rows * WIDTH).map(|i| (i as f32 * 0.7).sin()).collect();
        let device = crate::device().autodiff();
        let x = Tensor::<2>::from_data(TensorData::new(x, [rows, WIDTH]), &device);
        let y = two.first.forward(x).tanh();
        let y = match part % 2 {
            0 => two.second.forward(y).tanh(),
            _ => y,
        };
        (total(y.clone() * y), rows)
    }

    fn gradients(two: &Two, loss: Tensor<1>) -> Vec<Vec<f32>> {
        let mut found = Found {
            gradients: loss.backward(),
            flat: Vec::new(),
        };
        two.visit(&mut found);
        found.flat.into_iter().flatten().map(values).collect()
    }

    #[test]
    fn the_sum_of_parts_is_that_of_one_graph_and_the_same_on_any_number_of_threads() {
        let mut init = Init::new(3, &crate::device().autodiff());
        let two = Two {
            first: init.linear(WIDTH, WIDTH),
            second: init.linear(WIDTH, WIDTH),
        };
        let parts: Vec<usize> = (0..7).collect();
        let whole = parts.iter().map(|&part| loss(&two, part).0);
        let whole = whole.reduce(|sum, more| sum + more).unwrap();
        let expected = (values(whole.clone())[0], gradients(&two, whole));

        let with_threads = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let (sum, rows) = sum_of_losses(&two, parts.clone(), loss);
                assert_eq!(rows, [300, 600, 900, 1200, 1500, 1800, 2100]);
                (values(sum.clone())[0], gradients(&two, sum))
            })
        };
        let found = with_threads(1);
        assert!((found.0 - expected.0).abs() < 1e-5 * expected.0);
        assert_eq!(found.1.len(), 4);
        for (found, expected) in found.1.iter().zip(&expected.1) {
            let largest = expected.iter().fold(0f32, |most, v| most.max(v.abs()));
            for (found, expected) in found.iter().zip(expected) {
                let wrong = (found - expected).abs();
                assert!(wrong < 1e-5 * largest, "{found} {expected}");
            }
        }
        assert_eq!(found, with_threads(4));
    }
}
